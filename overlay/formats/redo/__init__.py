"""What a mirror has received and not yet made durable in its image."""
