"""The export stage: plan, corrections and checkpoint in, verified artifact directories out."""

# In every artifact: what it is, its files' hashes, and how it was verified.
ARTIFACT_FILE = "gradmap.json"
# In a vLLM-ready directory, vLLM's settings for it. Named here, so that serving need not import what export computes.
VLLM_CONFIG_FILE = "vllm.yaml"
GGUF_FILE = "model.gguf"
