"""One client from accept to its end: who may come, the handshake, TLS, who else is connected."""
