"""The cache: SGLang's tree class, thin, over parts that follow it, lock sources and keep text."""
