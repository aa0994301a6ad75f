"""Speed side by side: this project's blocks against each other, against other packages, against what their FLOPs
allow."""
