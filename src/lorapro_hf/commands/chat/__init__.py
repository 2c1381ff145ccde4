"""The command `lorapro chat`: a conversation with an adapter, a merged model or a base model."""
