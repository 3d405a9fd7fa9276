"""A campaign against attrdb: kills, crowds, full disks, shortages, odd command lines, flipped bits, broken pictures.

    make torture        # all of it, about an hour; tests/test_torture.py runs a slice in every test run

Every trial is compared with what an undisturbed run leaves. A problem is a row lost or doubled, a traceback, an answer that
is wrong without a word, or a job that does not go on when it is given again.
"""
