"""GPT-2 from scratch: the library behind the pipeline's stages."""
