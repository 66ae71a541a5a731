"""What keeps everybody from running A's guest on a disk that is out of date."""
