"""How much work each operator does: one function per family of operators."""
