"""Files and data sets -> rows of messages."""
