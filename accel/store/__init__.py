"""What is kept: in memory and on the disk."""
