"""Training a host from nothing: autoencoder, then transformer."""
