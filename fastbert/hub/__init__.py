"""What Hugging Face's `kernels` package loads: layers by name, FlashAttention's functions, and the folder that holds them.

layers.py, flash_attention.py and packed.py are copied into a build folder beside the kernels (build.py): they import nothing
but torch and each other, relatively.
"""
