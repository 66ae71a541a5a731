"""What an overlay is on disk: one Image interface, and the layouts flat and QED."""
