"""Floor 7: training a fold. What a page here attaches to a grouped model folds away into ordinary weights."""
