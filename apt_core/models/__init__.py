"""The networks: Wan, MMDiT, VAE, text encoder, adapters, attention."""
