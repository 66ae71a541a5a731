"""What is looked at on both hosts before anything is started."""
