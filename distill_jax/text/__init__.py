"""The text side: tokenizers with exact byte ends, prompts, and the alignment of two tokenizations on bytes."""
