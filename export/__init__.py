"""The export stage: plan, corrections and checkpoint in, verified artifact directories out."""

# In a vLLM-ready directory, vLLM's settings for it. Named here, so that serving need not import
# what export computes.
VLLM_CONFIG_FILE = "vllm.yaml"
GGUF_FILE = "model.gguf"
