"""What influenced an image, and how much: from similarities to influence, for one image or for many."""
