"""What a model is worth: perplexity, accuracy, answers; dense against pruned, with a gate.

- evaluate.py: all of it, for one model or for two
- evaluated_models.py: which models these are, and where they run
- backends.py: what a model must be able to do, wherever it runs: score continuations, and generate
- *_backend.py: transformers, vLLM, ONNX Runtime, an OpenAI-compatible server
- scoring.py: scores any number of requests with any backend: in order of length, cached, resumable
- perplexity.py, tasks.py, few_shot.py, harness_model.py, answers.py, agreement.py: what is measured
- comparison.py: paired statistics and the verdict, from what was measured
- table.py: results as a table
"""
