"""What is measured to choose: target layers for taps and exits, and what a drafter would gain there."""
