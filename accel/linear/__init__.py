"""The model's linears: their module, the operators that compute them, and what is bound to them."""
