"""``make soak``: tens of millions of requests in fast motion, while memory and descriptors must stay flat."""
