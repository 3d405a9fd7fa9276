"""Monitoring a customization: which image moved the model when.

After MONTRAGE (Brokman et al., ECCV 2024), whose procedure is not public: docs/monitoring.md says what is theirs and what is
ours.
"""
