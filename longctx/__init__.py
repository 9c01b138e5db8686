"""longctx: long-context attention research in JAX and Pallas."""

__version__ = "0.1.0"
