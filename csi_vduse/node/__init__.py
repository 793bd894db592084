"""What NodeStage, NodePublish, NodeExpand and their opposites do: small transactions over kernel truth."""
