"""What people have: image-text pairs in tars, tables and folders, read into one kind of sample."""
