"""What is served: exports that come and go, directories, images and how they are opened."""
