"""kalmagrove compress: a dense model whose matrices become factors over shared bases, chosen by what they cost."""
