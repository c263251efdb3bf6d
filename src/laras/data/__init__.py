"""From files of examples to tokens with loss masks, in sealed splits. No torch at import."""
