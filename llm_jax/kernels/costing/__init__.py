"""What the kernels cost on TPUs, by the compiler: block sizes, budgets, and the report."""
