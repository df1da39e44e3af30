package apiserver

import (
	"encoding/json"
	"net/http"
)

// Fail writes an error as Kubernetes does, for handlers of Config.Extra.
func Fail(w http.ResponseWriter, status int, reason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]any{
		"kind": "Status", "apiVersion": "v1", "metadata": map[string]any{}, "status": "Failure", "reason": reason, "message": message, "code": status,
	})
}
