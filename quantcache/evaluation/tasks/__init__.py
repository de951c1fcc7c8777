"""Questions and programs, answered by a model through several caches: MMLU, C-Eval, GSM8K and HumanEval."""
