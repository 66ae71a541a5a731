"""The hot loop that serves a client's requests, and what it stands on."""
