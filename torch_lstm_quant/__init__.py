"""torch.ao's individually observed LSTM, lowered to a fused kernel that computes it in integers, exactly and fast."""
