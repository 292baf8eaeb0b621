"""The serving stage: a vLLM-ready directory in, a supervised OpenAI-compatible endpoint out."""
