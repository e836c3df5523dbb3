"""The plain twin: the same decisions as the runtime's, without SGLang. Never imports it."""
