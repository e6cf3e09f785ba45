"""ROC curves, intervals and bounds."""
