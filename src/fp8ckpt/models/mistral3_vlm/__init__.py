"""Mistral3 vision-language models: Mistral Medium 3.5, Ministral 3, Devstral 2."""
