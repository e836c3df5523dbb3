"""Choose a worker by what each has cached: a process in front of the gateway. Without SGLang."""
