"""The method as the paper writes it: flow, generator, discriminator, objectives, consistency."""
