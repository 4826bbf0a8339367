"""What KBFGS and KBFGSL are made of; nothing else uses it."""
