"""nbdserve's command line."""
