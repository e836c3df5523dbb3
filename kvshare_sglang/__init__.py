"""KV-cache reuse beyond the prefix, as a plug-in for stock SGLang. Importing this costs nothing."""

__version__ = "0.1.0"
