"""What a model is: families, sizes, linears, tensor names and the placement of factors. No torch, no Megatron."""
