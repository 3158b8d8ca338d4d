"""What a kernel visits, and the kernels: one arithmetic in several spellings that give the same bits."""
