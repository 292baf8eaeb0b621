"""Programs that load an artifact as its users will, each run in a fresh process: `python -m
export.runners.NAME`.

They know the runtime's own library and none of our arithmetic. Arguments: DIRECTORY PROBE OUT. The
probe (safetensors) holds `input_ids` (B, T) int64 and `greedy_tokens` (), how many tokens to
generate after the first sample. They write to OUT: `greedy_ids` (G,) and either `logits` (B, T, V)
with `cached_logits` (B, V), the last position reached through the KV cache, or (vLLM, which shows
no logits) `logprob_ids` and `logprobs` (B, T - 1, k), or one position fewer where no token is to be
generated. The file's metadata names the `runtime`.
"""
