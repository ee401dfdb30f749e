"""The paper's table and its fourteen claims, trained again and answered."""
