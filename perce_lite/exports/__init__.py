"""Adapters for the programs that run them: PEFT, merged, GGUF, Ollama, vLLM, the Hub; each proven by loading it."""
