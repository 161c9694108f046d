"""Analysis: what trained models can be asked, beside how good their samples are."""
