"""Floor 6: what is counted of the texts that models write (BLEU, ROUGE, wrong words), and whether a difference is more than chance."""
