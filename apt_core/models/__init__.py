"""The networks: Wan, MMDiT, VAE, text encoder, adapters, attention."""

import warnings

# Without CUDA torch remarks on a model of diffusers 0.36 that is not used here, when diffusers is imported.
warnings.filterwarnings("ignore", "User provided device_type of 'cuda'", module=r"torch\.amp\.autocast_mode")
