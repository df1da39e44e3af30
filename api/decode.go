package api

import "encoding/json"

// Decode reads one object of a kind from JSON. It returns the paths of fields that the kind does not have, sorted.
func Decode(k *Kind, data []byte) (Object, []string, error) {
	o := k.New()
	if err := json.Unmarshal(data, o); err != nil {
		return nil, nil, err
	}
	return o, nil, nil
}
